"""The CPU core: C++ with a plain C interface, its build and its ctypes bindings."""
