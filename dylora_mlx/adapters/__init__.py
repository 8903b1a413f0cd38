"""Pure mappings from an expert to the formats of others. No file is read or written here."""
