"""The commands, a file for each kind: each checks what it was given, calls the library and says what came of it.

Torch is imported by the commands that need it, and only once all that the user can have got wrong has been checked.
"""
