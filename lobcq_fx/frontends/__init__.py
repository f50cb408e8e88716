"""One front end for each kind of model: how it is traced, called, built and loaded."""
