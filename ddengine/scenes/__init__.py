"""Pictures that the project draws itself, with known parts, so that every drag has a true answer.

A :class:`~ddengine.scenes.scene.Scene` is a record of numbers; `render` draws it and `moved` gives the same scene with
one part somewhere else. The embedded model is trained on these pictures, and the scene bench measures edits on them.
"""
