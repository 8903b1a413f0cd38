"""Code problems: prompts, the programs that check completions, and the fence they run in."""
