"""Numbers over frames: means with honest intervals."""
