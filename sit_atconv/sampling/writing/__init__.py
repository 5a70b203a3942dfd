"""What samples become: a directory with npz and PNG files, a grid, a model card."""
