"""Everything that happens while one skill is learned."""
