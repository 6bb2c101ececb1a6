"""python -m examples.demo [--full]"""

# not in this file: a process that is spawned finds functions by their module's name
from examples.demo.run import main

if __name__ == "__main__":
    main()
