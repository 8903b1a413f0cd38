"""A run from end to end: put together, resumed, looped over the stream, saved, forecast."""
