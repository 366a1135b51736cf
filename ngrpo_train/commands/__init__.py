"""The commands of `ngrpo`, a file each: its flags and what it does."""
