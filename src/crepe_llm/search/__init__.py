"""The search for coefficients: space, optimisers, fitness, record. Imported by the modifier of the search and the CLI."""
