"""`python -m train`: see `python -m train --help`."""

from train.main import main

main()
