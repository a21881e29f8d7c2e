"""Does a language model that was trained on feedback represent the reward it anticipates?"""


class InterpError(Exception):
    """A problem of input or environment: one line saying what was found, expected, and what to do.

    The command line prints it after `error:` and exits with status 1, without a traceback.
    """
