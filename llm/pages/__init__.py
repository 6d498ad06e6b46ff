"""Records as pages in a browser and as colours in a terminal."""
