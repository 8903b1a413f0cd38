"""A run in the formats of others: folders, cards, the hub, checks, and the way back."""
