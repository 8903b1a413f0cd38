"""Caps on adapter parameters: merging, evicting, and the archive of what was removed."""
