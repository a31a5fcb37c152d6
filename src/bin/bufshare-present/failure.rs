//! What can go wrong between a lease and the screen, in words that say what to do.

use std::num::TryFromIntError;

use bufshare::host::client;
use bufshare::host::image::{Image, ImageError, fourcc_text};
use bufshare::host::syncobj;
use bufshare::protocol::Status;
use thiserror::Error;
use wayland_client::globals::BindError;
use wayland_client::{ConnectError, DispatchError};

/// Why nothing is shown (any more).
#[derive(Debug, Error)]
pub enum Failure {
    #[error(transparent)]
    Client(#[from] client::Error),
    #[error(
        "no buffer {0:?} is offered to the host; `bufsharectl list` shows those that are, --wait \
         waits for it"
    )]
    NoBuffer(String),
    #[error(transparent)]
    Image(ImageError),
    #[error("WAYLAND_DISPLAY is not set: there is no compositor to show anything")]
    NoDisplay,
    #[error("XDG_RUNTIME_DIR is not set: the compositor's socket cannot be found")]
    NoRuntimeDir,
    #[error("no compositor answers at WAYLAND_DISPLAY={display}; is it running as this user?")]
    NoCompositor { display: String, source: ConnectError },
    #[error("the compositor lacks {what}")]
    Lacks { what: &'static str, source: BindError },
    #[error(
        "the compositor lacks zwp_linux_dmabuf_v1 version 3, so it cannot show a dma-buf; start it \
         with a GL or Vulkan renderer (weston: --renderer=gl)"
    )]
    NoDmabuf,
    #[error("the compositor lacks wl_shm, and this host has no udmabuf to give it a dma-buf")]
    NoShm,
    #[error(
        "the compositor does not take {format} (modifier {modifier:#x}) by {by}; it takes {known}"
    )]
    Format { by: &'static str, format: String, modifier: u64, known: String },
    #[error(
        "the compositor could not import the dma-buf ({} {}x{}, stride {}, offset {}); most GPUs \
         want strides that are multiples of 64 or 256 bytes",
        fourcc_text(*fourcc), image.width, image.height, image.planes[0].stride, image.planes[0].offset
    )]
    Import { fourcc: u32, image: Image },
    #[error("the buffer is too large for wl_shm")]
    TooLarge(#[source] TryFromIntError),
    #[error("the compositor ended the connection")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("a system call failed")]
    Kernel(#[source] std::io::Error),
}

impl Failure {
    pub fn format(
        by: &'static str,
        fourcc: u32,
        modifier: u64,
        known: impl Iterator<Item = u32>,
    ) -> Failure {
        let mut known: Vec<_> = known.map(fourcc_text).collect();
        known.sort();
        let known = if known.is_empty() { "none with it".to_owned() } else { known.join(", ") };
        Failure::Format { by, format: fourcc_text(fourcc), modifier, known }
    }

    pub fn exit_status(&self) -> u8 {
        match self {
            Failure::Client(client::Error::Refused { status: Status::NoEnt, .. }) => 4,
            Failure::Client(client::Error::Refused { .. }) => 5,
            Failure::Client(client::Error::Ambiguous { .. }) | Failure::NoBuffer(_) => 4,
            Failure::Client(_) => 3,
            Failure::Image(_) | Failure::Format { .. } => 6,
            Failure::Import { .. } | Failure::TooLarge(_) => 6,
            Failure::NoDisplay | Failure::NoRuntimeDir | Failure::NoCompositor { .. } => 7,
            Failure::Lacks { .. } | Failure::NoDmabuf | Failure::NoShm => 7,
            Failure::Lost(_) => 7,
            Failure::Kernel(_) => 1,
        }
    }
}

impl From<syncobj::Error> for Failure {
    fn from(error: syncobj::Error) -> Self {
        match error {
            syncobj::Error::Client(error) => Failure::Client(error),
            syncobj::Error::Kernel(error) => Failure::Kernel(error),
        }
    }
}

impl From<DispatchError> for Failure {
    fn from(error: DispatchError) -> Self {
        Failure::Lost(Box::new(error))
    }
}
