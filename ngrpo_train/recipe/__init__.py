"""What a user can set: sections, algorithms' settings, recipes (TOML) and flags, and what a resumed run may change."""
