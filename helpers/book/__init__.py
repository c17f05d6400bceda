"""How a page of the collection is run, drawn, checked and exported. The kernels do not need it."""
