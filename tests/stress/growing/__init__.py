"""Parts of the test that grows one run to many skills."""
