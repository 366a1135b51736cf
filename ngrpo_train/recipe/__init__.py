"""Settings of a run: sections, algorithms' fields, recipes (TOML), flags, and what a resumed run may change."""
