"""How fast the parts of dino2 run on this machine, beside what the machine or the plain way can do."""
