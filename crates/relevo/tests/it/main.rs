//! Integration tests of the whole repository.

mod tidy;
