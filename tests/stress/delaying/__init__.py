"""Two network namespaces, and a cable between them that takes its time."""
