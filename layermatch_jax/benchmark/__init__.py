"""How fast a run is, part by part."""
