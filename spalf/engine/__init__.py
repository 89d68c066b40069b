"""A plan becomes numbers here: one state tree, stepped, saved and exported. Knows protocols, never a part."""
