"""The one exception whose message is meant for the person at the terminal."""


class UserError(Exception):
    """Say in one line what is wrong, which value it was, and the way out.

    `main()` prints it as `Error: ...` and exits with status 2, without a traceback.
    """
