//! An operator who gives orders to engines, and takes them back.

use std::time::Duration;

use relevo_replication::{Input, Order, OrderId};
use relevo_types::VolumeId;

use super::{Cluster, Event, node_id};
use crate::{check::Verdict, net::Index};

impl Cluster {
    /// Gives an order to an engine, and the opposite one a while later.
    pub(super) fn give_orders(&mut self, node: Index) -> Verdict {
        if self.chance.trouble.chance(20.0) {
            self.marks.reached("an operator invalidated a replica");
            return self.order(node, Order::Invalidate);
        }
        let (order, opposite) = if self.chance.trouble.chance(30.0) {
            self.marks
                .reached("an operator verified while all was in use");
            let repair = self.chance.trouble.chance(50.0);
            let node = self.open_primary().unwrap_or(node);
            let later = self.chance.trouble.spread_millis(1, 100);
            let stop = Event::Order {
                node,
                order: Order::StopVerify { peer: None },
            };
            if self.chance.trouble.chance(20.0) {
                self.queue.after(later, stop);
            }
            return self.order(node, Order::Verify { peer: None, repair });
        } else if self.chance.trouble.chance(30.0) {
            if self.chance.trouble.chance(30.0) {
                self.marks
                    .reached("a node let resyncs wait for another volume's");
                let after = Some(VolumeId(99));
                (Order::HoldSync { after }, Order::HoldSync { after: None })
            } else {
                self.marks.reached("an operator paused a resync");
                (
                    Order::PauseSync { peer: None },
                    Order::ResumeSync { peer: None },
                )
            }
        } else if self.chance.trouble.chance(50.0) {
            self.marks.reached("an operator suspended I/O");
            (Order::SuspendIo, Order::ResumeIo)
        } else {
            self.marks.reached("an operator disconnected a replica");
            let peer = self.other_than(node, self.scenario.data_nodes);
            let peer = self.chance.trouble.chance(60.0).then(|| node_id(peer));
            (Order::Disconnect { peer }, Order::Connect { peer })
        };
        let later = self.chance.trouble.spread_millis(5, 600);
        let order_later = Event::Order {
            node,
            order: opposite,
        };
        self.queue.after(later, order_later);
        self.order(node, order)
    }

    /// Takes back what any engine was ordered.
    pub(super) fn end_orders(&mut self) {
        for node in 0..self.scenario.data_nodes {
            for order in [
                Order::ResumeIo,
                Order::Connect { peer: None },
                Order::ResumeSync { peer: None },
                Order::HoldSync { after: None },
            ] {
                self.queue
                    .after(Duration::ZERO, Event::Order { node, order });
            }
        }
    }

    pub(super) fn order(&mut self, node: Index, order: Order) -> Verdict {
        self.last_order += 1;
        let id = OrderId(self.last_order);
        self.feed(node, Input::Order { id, order })
    }
}
