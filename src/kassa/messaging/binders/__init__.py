"""One file per broker; `registry.py` names them."""

import os

# Read when gRPC is imported, so it stands before any binder. Else gRPC revives its threads in each child between fork and exec
# (of PostgreSQL, of a sandbox), where they use what is closed already, and write into the child's error output or end it.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
