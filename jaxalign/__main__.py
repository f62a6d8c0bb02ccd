"""`python -m jaxalign`: the command of the same name."""

from jaxalign import commands

if __name__ == "__main__":
    commands.main()
