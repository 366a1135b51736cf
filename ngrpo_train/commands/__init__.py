"""The commands of `ngrpo`, one file each, with its flags and its work."""
