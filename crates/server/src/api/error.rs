//! How a refusal reads: what happened, why, what to do.

use std::fmt;

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

/// Why a call failed. Every part is a phrase for people; the CLI prints all three.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ApiError {
    /// Class of the error, for programs.
    pub kind: ErrorKind,
    /// What happened: `volume mail was not created`.
    pub error: String,
    /// Why: `node beta has 3 GiB free, 20 GiB were asked for`.
    pub reason: String,
    /// What a person can do about it. Empty when the reason says it already.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// Class of an error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request itself is wrong; asking again changes nothing.
    BadRequest,
    /// What it is about does not exist.
    NotFound,
    /// It does not fit the state the cluster is in.
    Refused,
    /// It can't be done now: no majority, a node is away, a time-out. Nothing was changed, or
    /// the text says what was.
    Unavailable,
    /// The daemon failed.
    Internal,
}

impl ApiError {
    /// An error of a class.
    #[must_use]
    pub fn new(
        kind: ErrorKind,
        error: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            error: error.into(),
            reason: reason.into(),
            remedy: remedy.into(),
        }
    }

    /// The same error about something more: `what` replaces the first part.
    #[must_use]
    pub fn because(mut self, what: impl Into<String>) -> Self {
        self.error = what.into();
        self
    }

    /// The HTTP status of the answer.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        match self.kind {
            ErrorKind::BadRequest => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Refused => StatusCode::CONFLICT,
            ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.error, self.reason)?;
        if self.remedy.is_empty() {
            Ok(())
        } else {
            write!(f, "; {}", self.remedy)
        }
    }
}

impl std::error::Error for ApiError {}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status(), Json(self)).into_response()
    }
}
