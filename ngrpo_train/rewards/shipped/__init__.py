"""The rewards that ship with ngrpo, a file each, of the reward's name."""
