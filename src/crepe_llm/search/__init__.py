"""The search for coefficients: space, optimisers, fitness and record."""
