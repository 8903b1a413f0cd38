"""The router and what it reads."""
