"""2:4 matrix products: C++ on CPUs, cuSPARSELt and CUTLASS on GPUs, and a reference that decompresses."""
