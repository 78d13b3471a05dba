"""What decoding raises for JSON that was not made by us: by a guest, a hypervisor that a guest may
have taken over, a repository, the web.
"""

from __future__ import annotations

import msgspec

#: msgspec's own for a wrong form; for bytes that are not UTF-8 and for a depth that nothing of ours
#: has it raises Python's, which are no MsgspecError.
MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
