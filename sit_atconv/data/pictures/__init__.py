"""Single pictures: the interface of their sources, decoding files to pixels, cropping."""
