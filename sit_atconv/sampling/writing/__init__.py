"""Writers: a directory of samples with npz and PNG files, a grid, and a model card."""
