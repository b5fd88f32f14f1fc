"""`python -m stereo_cli`."""

from stereo_cli.main import main

main()
