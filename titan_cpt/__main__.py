"""`python -m titan_cpt` is `titan-cpt`."""

from titan_cpt.cli import main

main()
