"""Pool growth: measure novelty, decide on an action, and add, grow or freeze experts."""
