"""Objects and points through a video."""
