"""The recipe of the bundled tiny driver: what it is trained on, how, in which files, and how good it gets."""
