//! Buffer sharing across virtual machines: the daemon's library.
