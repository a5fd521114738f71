"""What the commands of studies share: one audit for every method, and the methods."""
