"""banger: one-command development sandboxes on microVMs.

The layers, from the user inwards: ``cli`` and ``sdk`` speak ``rpc`` to ``daemon``, whose
``services`` drive microVMs through ``drivers``, ``images`` and ``guest``. ``base`` is what all
of them share. `docs/architecture.md` has the whole picture.
"""

__version__ = "0.1.0"
