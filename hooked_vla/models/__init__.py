"""One file per model family: how its pathways are wired, and how its public config.json states their sizes."""
