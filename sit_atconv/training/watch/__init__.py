"""How a run is watched: speed, sample grids and scores."""
