"""python -m sensibert"""

from .cli import main

main()
