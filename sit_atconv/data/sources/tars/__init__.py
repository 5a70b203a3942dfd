"""Pictures in tars, which are read without unpacking: class folders, WebDataset's shards, a tar of tars."""
