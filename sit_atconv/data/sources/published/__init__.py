"""Published data sets in the files of their authors, as torchvision keeps them."""
