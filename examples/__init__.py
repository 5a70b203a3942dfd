"""Programs that use the image networks as backbones (docs/zoo.md). Each runs as `python -m examples.NAME`."""
