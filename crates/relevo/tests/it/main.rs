//! Integration tests of the whole: the demo as a user runs it, and the house rules.

mod demo;
mod tidy;
